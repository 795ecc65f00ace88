"""What hwbpd costs, beside the floor that nothing on this host can go below. See benchmarks/README.md."""
