"""Calls of attention that methods change, wherever a module makes them, and its key and value projections."""
