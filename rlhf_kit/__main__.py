"""`python -m rlhf_kit` is `rlhf-kit`."""

from rlhf_kit.cli import main

if __name__ == "__main__":
    main()
