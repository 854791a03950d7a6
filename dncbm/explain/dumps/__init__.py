"""What figures are drawn from: one module per kind of explanation, and in `dump` what they share."""
