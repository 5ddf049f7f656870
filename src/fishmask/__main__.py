"""``python -m fishmask``."""

from fishmask.cli import main

if __name__ == "__main__":
    main()
