"""Run text through a model and measure the inputs and the output gradients of its matrices."""
