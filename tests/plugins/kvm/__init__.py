"""The KVM switch engine."""
