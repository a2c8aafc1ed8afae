"""describe(model): which known scheme explains a tensor."""
