"""``python -m mpo_lightning`` is ``mpo-lightning``."""

from mpo_lightning.cli import main

if __name__ == "__main__":
    main()
