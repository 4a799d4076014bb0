"""The model room. Importing it teaches `AutoConfig` and `AutoModelForCausalLM` what a moonwhale is."""
