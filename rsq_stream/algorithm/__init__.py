"""The method as pure functions: tensors in, tensors out."""
