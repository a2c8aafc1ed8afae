"""Image sets: MNIST, CIFAR-10, and the one shipped with the package, the UCI digits, 1,797 images of 8 x 8 (see README.md here for source and licence)."""
