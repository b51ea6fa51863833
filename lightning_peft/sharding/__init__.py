"""Models that are spread over processes by Lightning's strategies."""
