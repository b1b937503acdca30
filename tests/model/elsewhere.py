"""A stream whose model is not where its text encoder is: "meta" stands in for a GPU, and refuses what the CPU has."""

from echo_infinity.finite import NoWatch
from echo_infinity.pipeline import EchoPipeline


def stream_elsewhere(checkpoint, prompts, **options):
    """Devices of the latents and pixels of a stream that evicts, switches both ways and decodes."""
    moved = {name: getattr(checkpoint, name).to("meta") for name in ("model", "memory", "codec")}
    pipe = EchoPipeline(checkpoint._replace(**moved), **options)
    stream = pipe.stream(prompts[0], output_type="latents")
    stream._sampler.finite = NoWatch()  # there are no numbers to look at
    latents = [stream.next_latents() for _ in range(7)]
    for anew in (True, False):
        stream.switch(prompts[1], global_sink=not anew, memory_recache=anew)
        latents.append(stream.next_latents())
    pixels, state = pipe.codec.decode(latents[0][None])
    return {x.device.type for x in (*latents, pixels, pipe.codec.decode(latents[1][None], state)[0])}
