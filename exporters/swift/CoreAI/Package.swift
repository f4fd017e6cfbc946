// swift-tools-version: 6.0
// Made by packlight: a Core AI bundle in Apple's runner, for apps of iOS 27 and macOS 27. `swift test`
// on a Mac checks the bundle around this package against parity.json.
import PackageDescription

let package = Package(
    name: "PacklightCoreAI",
    platforms: [.iOS("27.0"), .macOS("27.0")],
    products: [
        .library(name: "PacklightCoreAI", targets: ["PacklightCoreAI"]),
    ],
    dependencies: [
        .package(name: "PacklightModel", path: ".."),
        .package(url: "https://github.com/apple/coreai-models", from: "0.2.0"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0"),
    ],
    targets: [
        .target(
            name: "PacklightCoreAI",
            dependencies: [
                .product(name: "PacklightCore", package: "PacklightModel"),
                .product(name: "PacklightModel", package: "PacklightModel"),
                .product(name: "CoreAILM", package: "coreai-models"),
            ]
        ),
        .executableTarget(name: "measure-coreai", dependencies: ["PacklightCoreAI"]),
        .testTarget(
            name: "CoreAIParityTests",
            dependencies: [
                "PacklightCoreAI",
                .product(name: "PacklightCore", package: "PacklightModel"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]
        ),
    ],
    swiftLanguageModes: [.v5]
)
