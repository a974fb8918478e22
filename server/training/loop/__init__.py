"""One job from its data to its adapter: optimizer steps, evaluation, checkpoints."""
