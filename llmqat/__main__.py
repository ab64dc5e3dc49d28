"""`python -m llmqat ...` and `accelerate launch -m llmqat ...`: the command line."""

from llmqat.cli import main

if __name__ == "__main__":
    main()
