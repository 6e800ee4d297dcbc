"""Conditioner networks that several families share; import each from its own module, such as `pygen.nn.residual`."""
