"""Virtual machines for tests and benchmarks: stock QEMU, stock virtiofsd, a stock kernel, by software emulation.

`parts` says what they are made of and whether it is there; `initramfs` packs what a guest starts from; `machine` runs
one; `runner` is the program in the guest that does what the host asks for; `inside` has what it is asked for.
"""
