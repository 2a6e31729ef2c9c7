"""From a call to its launches: options, plan, launch, gradients."""
