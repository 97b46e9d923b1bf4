"""`python -m saccade_client` is the command `saccade-client`."""

from saccade_client.cli import main

if __name__ == "__main__":
    main()
