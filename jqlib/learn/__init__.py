"""What is found from data: activations, scales, rotations, and the stages that go by the loss."""
