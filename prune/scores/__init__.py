"""How much each weight matters: one score a file, as pure functions on tensors."""
