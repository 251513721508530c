"""What people read: evaluation, changelog, card, plan, diff, explain."""
