"""The demo: draws a data set, runs the whole way of a training job on it, shows what came out."""
