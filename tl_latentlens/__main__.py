"""`python -m tl_latentlens`: the command line, where its script is not on the path."""

from tl_latentlens.cli import main

if __name__ == "__main__":
    main()
