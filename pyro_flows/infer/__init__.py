"""Inference: FlowVI and what it is made of."""
