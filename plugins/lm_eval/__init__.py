"""rdkv as a model of lm-evaluation-harness; imported by its entry point, and never by rdkv itself."""
