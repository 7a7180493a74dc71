"""The guest lab: QEMU, kernels and a root file system from Debian's packages, and guests that run on them."""
