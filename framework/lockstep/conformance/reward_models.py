"""One finite score per response, whatever the batch; failures are heard."""
