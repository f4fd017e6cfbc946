// swift-tools-version: 6.0
// Made by packlight. `swift test` on a Mac checks the folder above this one against parity.json;
// on Linux it runs the tests of PacklightCore, which needs no framework of Apple's.
import PackageDescription

let package = Package(
    name: "PacklightModel",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "PacklightCore", targets: ["PacklightCore"]),
        .library(name: "PacklightModel", targets: ["PacklightModel"]),
    ],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0"),
    ],
    targets: [
        .target(name: "PacklightCore"),
        .target(
            name: "PacklightModel",
            dependencies: [
                "PacklightCore",
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]
        ),
        .executableTarget(name: "measure", dependencies: ["PacklightModel"]),
        .testTarget(name: "CoreTests", dependencies: ["PacklightCore"]),
        .testTarget(name: "ParityTests", dependencies: ["PacklightModel"]),
    ],
    swiftLanguageModes: [.v5]
)
