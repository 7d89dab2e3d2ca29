"""The supervisor of one job: torch-free; claims, stages, hands to a trainer, relays reports, publishes, ends."""
