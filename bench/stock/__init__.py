"""The bottlenecks of other projects in plain torch, written from their description: what the fused ones are beside."""
