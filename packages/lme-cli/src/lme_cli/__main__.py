"""`python -m lme_cli` is `lme`; torchrun starts runs this way."""

from lme_cli.app import main

if __name__ == "__main__":
    main()
