"""FactCC: is a claim consistent with its document? Items, generated and read; scoring;
statistics."""
