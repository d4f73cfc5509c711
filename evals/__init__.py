"""Alignment suites, the judge, the gate and its report: what a verdict is made of."""
