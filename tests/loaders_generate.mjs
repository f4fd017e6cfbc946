// Greedy tokens of ONNX folders in Transformers.js, in Node and in a browser.

/**
 * @param library the module of Transformers.js
 * @param cases list of {name, place, prompt}: a model's place, and token ids
 * @param count tokens to generate
 * @param options of from_pretrained, such as {device: "webgpu"}
 * @returns for each name the tokens, or the text of the error
 */
export async function generate(library, cases, count, options) {
  const { AutoModelForCausalLM, Tensor } = library;
  const found = {};
  for (const { name, place, prompt } of cases) {
    const shape = [1, prompt.length];
    try {
      const model = await AutoModelForCausalLM.from_pretrained(place, options);
      const tokens = await model.generate({
        input_ids: new Tensor("int64", BigInt64Array.from(prompt, BigInt), shape),
        attention_mask: new Tensor("int64", new BigInt64Array(prompt.length).fill(1n), shape),
        max_new_tokens: count,
        min_new_tokens: count,
        do_sample: false,
      });
      found[name] = Array.from(tokens.data, Number).slice(prompt.length);
      await model.dispose();
    } catch (error) {
      found[name] = String(error);
    }
  }
  return found;
}
