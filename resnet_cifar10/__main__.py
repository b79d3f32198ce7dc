"""`resnet-cifar10` and `python -m resnet_cifar10`."""

import signal


def main() -> None:
    """Run the command line; until that is imported, Ctrl-C just ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
