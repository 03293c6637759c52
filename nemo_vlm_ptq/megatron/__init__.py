"""The only room that imports megatron: session, model, checkpoint, forward."""
