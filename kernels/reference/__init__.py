"""Plain-torch definition of every op, one module an op family: the specification, the test oracle, and the fallback where no compiler is installed."""
