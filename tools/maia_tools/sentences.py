"""What ``maia demo`` embeds when it is given nothing: groups of like meaning, in several lengths and languages."""

from __future__ import annotations

SENTENCES: tuple[str, ...] = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sunshine by the window.",
    "Die Katze schläft auf der warmen Fensterbank.",
    "Le chat dort sur le rebord de la fenêtre.",
    "Dogs love to chase sticks in the park.",
    "The puppy ran across the field to fetch a ball.",
    "How do I reset my password?",
    "I forgot my login and cannot get into my account.",
    "What are the steps to recover access when two-factor authentication fails and the phone is lost?",
    "¿Cómo puedo cambiar mi contraseña?",
    "The central bank raised interest rates by a quarter of a percentage point.",
    "Borrowing became more expensive after the decision of the monetary authority.",
    "Inflation slowed for the third month in a row, while unemployment stayed close to its lowest level in decades, "
    "and investors began to ask when policy makers would change course.",
    "Stock markets fell sharply today.",
    "Preheat the oven, mix flour with butter and sugar, and bake for twenty minutes.",
    "A simple recipe for shortbread biscuits.",
    "Wie backt man ein gutes Brot?",
    "Bread needs only flour, water, salt, yeast and patience: knead the dough until it is smooth, let it rise in a "
    "warm place until it has doubled, shape it, let it rise again, and bake it in a very hot oven with some steam.",
    "A doorbell register tells the device that new commands are waiting in the ring.",
    "The driver writes descriptors to a queue in host memory and then rings the doorbell.",
    "An interrupt is raised when the accelerator has finished its work.",
    "Direct memory access moves data between host and device without the processor's help; an IOMMU translates the "
    "addresses that the device uses, so that it can reach only the pages that the driver has mapped for it.",
    "Matrix multiplication dominates the running time of transformers.",
    "Attention lets every token look at every other token in the sentence.",
    "Neural networks learn representations from data.",
    "The stars are bright tonight.",
    "Astronomers photographed a black hole with telescopes on several continents.",
    "It is raining cats and dogs.",
    "It has been pouring with rain all day.",
    "明日の天気はどうですか。",
    "Какая завтра будет погода?",
    "What will the weather be like tomorrow?",
    "She plays the violin in an orchestra.",
    "A woman is performing classical music on a string instrument.",
    "He scored the winning goal in the last minute of the match.",
    "Football fans celebrated in the streets until the early morning.",
    "The train to Prague leaves at nine.",
    "Vlak do Prahy odjíždí v devět hodin.",
    "Yes.",
    "🙂 👍",
)
