"""`python -m resnet_cifar10`."""

from .cli import main

main()
