"""MiniCPM4 in transformers style: a Llama-shaped decoder with µP scalings and LongRoPE.

MiniCPM4 report (arXiv 2506.07900) §2.1. The state dict's names are the published checkpoints'.
Letters: B batch, T queries, S cached and new positions, C hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from minicpm4.configuration import MiniCPM4Config, PublishedMiniCPMConfig
from minicpm4.layers import Attention, DecoderLayer, RMSNorm
from minicpm4.longrope import RotaryEmbedding


class MiniCPM4PreTrainedModel(PreTrainedModel):
    """What the two models share: capabilities and initialisation."""

    config: MiniCPM4Config
    config_class = MiniCPM4Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """µP initialisation (MiniCPM, arXiv 2404.06395, table 2).

        Matrices inside the layers get init_std / √(width ratio); the embedding and the head, whose
        fan-in does not grow with the model, get init_std.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            is_head = module is self.get_output_embeddings()
            scale = 1.0 if is_head else self.config.width_ratio**-0.5
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            module.reset()


class MiniCPM4Model(MiniCPM4PreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MiniCPM4Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: tokens `[B, T]`; or give `inputs_embeds`.
            attention_mask: `[B, S]`, 0 at padding, over cached and new positions.
            position_ids: `[B, T]`; by default they go on from the cache.
            past_key_values: keys and values of earlier tokens; extended in place.
            inputs_embeds: `[B, T, C]`, before the scaling by `scale_emb`.
            use_cache: make a cache where none is given.

        Returns:
            `last_hidden_state` `[B, T, C]` after the final norm, before the head's µP scaling.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = seen + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cos_sin = self.rotary_emb(position_ids, inputs_embeds.dtype)
        x = inputs_embeds * self.config.scale_emb
        for layer in self.layers:
            x = layer(x, cos_sin, mask, past_key_values, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class MiniCPM4ForCausalLM(MiniCPM4PreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniCPM4Config) -> None:
        super().__init__(config)
        self.model = MiniCPM4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, vocab_size]`, and the mean loss in nats per token where labels are given.

        Args:
            labels: `[B, T]` token ids, -100 where no loss is wanted; shifted here by one.
            logits_to_keep: 0 for all positions, n for the last n, or the positions themselves.

        The other arguments are `MiniCPM4Model.forward`'s.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = (
            slice(-logits_to_keep or None, None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        hidden = outputs.last_hidden_state[:, kept] / self.config.width_ratio
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniCPMModel(MiniCPM4Model):
    """The same decoder under the name that the published `config.json` carries."""

    config_class = PublishedMiniCPMConfig


class MiniCPMForCausalLM(MiniCPM4ForCausalLM):
    """The same model under the name that the published `config.json` carries."""

    config_class = PublishedMiniCPMConfig
