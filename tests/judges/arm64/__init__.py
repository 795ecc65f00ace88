"""A real Arm kernel, under QEMU, as a judge; see docs/arm64.md."""
