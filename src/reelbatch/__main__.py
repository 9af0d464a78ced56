"""`python -m reelbatch` is the same as `reelbatch`."""

from reelbatch.cli import main

if __name__ == "__main__":
    main()
