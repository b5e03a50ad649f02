"""The zoo: public networks and awkward ones, each cut in three places, to see whether the surgery needs a hand."""
