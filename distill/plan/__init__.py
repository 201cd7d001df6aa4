"""What a run will need before it is queued: bytes by network, activations by turn, work and traffic of a step."""
