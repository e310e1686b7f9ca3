"""Events read: where the peak is and what is alive there, two timelines aligned and compared, the
byte ledger."""
