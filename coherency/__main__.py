"""``python -m coherency``: the command line without an installed script."""

from coherency.cli import main

if __name__ == "__main__":
    main()
