"""Benchmarks of pyro_flows: reference posteriors, baselines, step timings."""
