"""KVM and the debug registers: the switch engine as pure state machines, and real vCPUs to hold it against."""
