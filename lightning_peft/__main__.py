"""``python -m lightning_peft`` is ``lightning-peft``."""

from .cli.main import main

if __name__ == "__main__":
    main()
