import Foundation

/// The index of the largest value; the first of equal ones.
public func greedy(_ logits: [Float]) -> Int {
    var best = 0
    for index in logits.indices where logits[index] > logits[best] {
        best = index
    }
    return best
}

/// Chooses the next token from logits.
public struct Sampler: Sendable {
    public var temperature: Float
    public var topP: Float

    /// Temperature 0 always takes the most likely token.
    public init(temperature: Float = 0, topP: Float = 0.95) {
        self.temperature = temperature
        self.topP = topP
    }

    public func next(
        _ logits: [Float], using random: inout some RandomNumberGenerator
    ) -> Int {
        let best = greedy(logits)
        if temperature <= 0 {
            return best
        }
        let weights = logits.map { exp(($0 - logits[best]) / temperature) }
        let sum = weights.reduce(0, +)
        var kept: [Int] = []
        var total: Float = 0
        for index in weights.indices.sorted(by: { weights[$0] > weights[$1] }) {
            kept.append(index)
            total += weights[index]
            if total >= topP * sum {
                break
            }
        }
        var left = Float.random(in: 0..<1, using: &random) * total
        for index in kept {
            left -= weights[index]
            if left < 0 {
                return index
            }
        }
        return best
    }
}
