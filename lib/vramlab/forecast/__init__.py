"""What a step will do to a card, with no GPU: virtual GPU, trace, forecast, and the chart of every
regime on every card."""
