"""Why an attention call goes past the session, where a reason must be known before the call runs."""

NO_CALL = "the attention module made no call that can be taken: a processor attends in its own way"
# Of families whose latents alone query: what else attends, before its keys are cached or read.
NO_LATENTS = "a call without the latents: the prompt's own"
# Not dense: a cache of diffusers gave an earlier output, and nothing attended.
CACHED = "a cache answered"
# Of diffusers' context parallelism.
PARALLEL_UNKNOWN = "context parallelism of an unknown kind"
# Why compiled code may go past the session; a graph counts by index.
PASSED = (
    "causal attention",
    "dropout",
    "attention_kwargs",
    "an attention mask that is no tensor",
    "a torch function mode watches attention",
    NO_CALL,
    CACHED,
    PARALLEL_UNKNOWN,
)
